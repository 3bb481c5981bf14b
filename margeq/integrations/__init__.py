"""Other libraries: what margeq hands over to them, and what it takes from them."""
