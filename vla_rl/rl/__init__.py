"""Stage 1: rollouts, advantages, PPO and SAC from demonstrations, on cached features."""
