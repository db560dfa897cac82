"""Written plans and launcher files held to the arithmetic: what holds, what does not, what cannot be known."""
