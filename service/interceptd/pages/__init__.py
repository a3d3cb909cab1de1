"""Ranges of pages and the containers that index them."""
