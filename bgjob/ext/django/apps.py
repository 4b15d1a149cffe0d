"""The app, which Django finds by its package: INSTALLED_APPS = ["bgjob.ext.django"]."""

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class BgjobConfig(AppConfig):
    """The app `bgjob`."""

    name = "bgjob.ext.django"
    label = "bgjob"
    verbose_name = _("Background jobs")
