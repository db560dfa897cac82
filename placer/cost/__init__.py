"""Modelled latency and memory: compute, collectives, memory, latency, and the constants behind them."""
