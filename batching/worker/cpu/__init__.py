"""The CPU backend in C++: paged attention, packed products, and a whole decoder in one call."""
