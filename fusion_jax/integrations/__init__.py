"""Adapters for other tools; each needs its tool, and nothing else imports them."""
