"""How ranks meet, who lives, and what signals ask of them."""
