"""Measured choices: the tables of them, the candidates worth a measurement, and the tuner that measures."""
