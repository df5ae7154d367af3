"""Speed and memory as ratios, each measured within one run on one machine: `make benchmark`."""
