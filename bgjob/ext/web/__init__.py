"""The web page: see and steer the queues in a browser.

It needs the extra `web`: `pip install "bgjob[web]"`.
"""
