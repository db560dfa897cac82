"""The decisions: search over strategies, layers to stages, ranks to GPUs, experts to slots; each with a bound."""
