"""`scaleot`, its training by layer replacement, and the importance that this learns."""
