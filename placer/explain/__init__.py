"""No answer: the smallest conflict between named requirements, and the smallest ways out of it, each proven by solving."""
