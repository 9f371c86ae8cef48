"""Optimizers under the names people know, each a point of curvature × basis × inner parts."""
