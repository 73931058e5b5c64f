"""The machine: environment, conditions, ceilings, devices, clocks."""
