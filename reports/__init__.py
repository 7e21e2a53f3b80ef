"""Pictures of what a run learnt."""
