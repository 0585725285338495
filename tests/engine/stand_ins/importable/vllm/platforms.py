"""As of a machine without a GPU."""


class CpuPlatform:
    device_name = "cpu"

    @classmethod
    def check_and_update_config(cls, config: object) -> None: ...


current_platform = CpuPlatform()
