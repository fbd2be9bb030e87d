"""What the data dictates: fingerprint, plan and planners."""
