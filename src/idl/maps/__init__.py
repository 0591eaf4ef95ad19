"""What is iterated: maps with parameters, their values for a solver and their derivatives as maps again."""
