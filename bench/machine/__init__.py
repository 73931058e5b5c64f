"""What the machine is and does: environment, conditions, ceilings, devices, clocks."""
