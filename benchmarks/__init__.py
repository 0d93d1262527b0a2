"""What the library's operations cost, as ratios to a plain forward pass measured in the same run."""
