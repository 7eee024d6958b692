"""From scores to the weights of a mask: top entries, rules, agreement of signs."""
