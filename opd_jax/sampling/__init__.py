"""The rollout engine: prefill, decode, slot refill, sampling transforms."""
