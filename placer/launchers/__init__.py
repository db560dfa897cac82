"""Placement -> files. One module per launcher, all behind `base.Launcher`; `registry` knows them all."""
