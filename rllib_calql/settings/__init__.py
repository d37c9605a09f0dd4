"""Every setting of `CalQLConfig`: what it is, its checks, what is refused."""
