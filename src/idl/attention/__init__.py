"""Attention as an equilibrium: its forms, what is eliminated exactly, and a bound on its contraction."""
