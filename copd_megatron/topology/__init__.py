"""Ranks carved into branch worlds, the router group, and collectives that say who hangs."""
