"""Equilibria in a row: sequences in which each equilibrium reads what the one before has left."""
