"""PEP 517 backend: setuptools, built against the torch that is already installed.

pip builds in an isolated environment. Listing torch as a build requirement would make it download a second torch (3 GB)
for every build, and perhaps another version than the one that will load the extension. So each hook lends the build
the torch that lies in the site-packages of the same Python, and asks for one only where there is none that is new
enough; the package's own requirement then has pip replace the old one, too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig

from setuptools import build_meta

OLDEST = 2, 13
TORCH = f"torch>={OLDEST[0]}.{OLDEST[1]}"


def _site_packages() -> list[str]:
    candidates = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        candidates.append(site.getusersitepackages())
    return [path for path in dict.fromkeys(candidates) if path]


def _installed_torch() -> str | None:
    """The site-packages folder that holds a usable torch, or None."""
    for path in _site_packages():
        version = os.path.join(path, "torch", "version.py")
        if os.path.isfile(version):
            with open(version) as file:
                found = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", file.read(), re.MULTILINE)
            if found and (int(found[1]), int(found[2])) >= OLDEST:
                return path
            return None  # Python would import that one
    return None


def _lend_torch() -> None:
    """Make the installed torch importable for the build, behind everything the isolated environment brings itself."""
    path = _installed_torch()
    if path and importlib.util.find_spec("torch") is None and path not in sys.path:
        sys.path.append(path)


def _requires() -> list[str]:
    if importlib.util.find_spec("torch") is not None or _installed_torch():
        return []
    return [TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _requires()


def get_requires_for_build_editable(config_settings=None):
    return _requires()


def get_requires_for_build_sdist(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _lend_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _lend_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _lend_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _lend_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return build_meta.build_sdist(sdist_directory, config_settings)
