"""Does the collapse regulariser do more than the training it is added to?"""
