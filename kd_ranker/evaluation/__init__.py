"""Label metrics, alignment, funnel and cost."""
