"""Stages 0 and 2: supervised learning of VLM and head."""
