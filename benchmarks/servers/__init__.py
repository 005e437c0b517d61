"""Do servers load the folders that the command writes?"""
