"""From checkpoint keys to a trainer's FQNs, box by box."""
