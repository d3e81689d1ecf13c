"""Do TRL's trainers do the same with `dpo_engine.integrations.trl` as without, release by release?"""
