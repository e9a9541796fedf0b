"""`keeplora analyze`: what the paper's claims look like in one's own model, point by measured point."""
