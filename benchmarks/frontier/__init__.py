"""How good are DPO and PPO where reward and KL are exactly known?"""
