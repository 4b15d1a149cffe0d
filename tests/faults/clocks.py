"""A worker process whose clock is off."""

SHIFTED = """
import datetime, os, time

shift = float(os.environ["SHIFT"])
real_time, real_time_ns, real = time.time, time.time_ns, datetime.datetime
time.time = lambda: real_time() + shift
time.time_ns = lambda: real_time_ns() + int(shift * 1e9)

class Shifted(real):
    @classmethod
    def now(cls, tz=None):
        return real.now(tz) + datetime.timedelta(seconds=shift)

    @classmethod
    def utcnow(cls):
        return real.utcnow() + datetime.timedelta(seconds=shift)

    today = now

class ShiftedDate(datetime.date):
    @classmethod
    def today(cls):
        return Shifted.now().date()

datetime.datetime, datetime.date = Shifted, ShiftedDate

from faults.app import main
print("shifted by", round(time.time() - real_time()), flush=True)
main()
"""
