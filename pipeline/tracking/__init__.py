"""What a run reports: metrics.jsonl, W&B, averages over an interval. Imports `storage` and below."""
