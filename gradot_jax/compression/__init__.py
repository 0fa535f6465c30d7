"""What to keep of a layer: scores, selection, budgets and plans, on arrays alone."""
