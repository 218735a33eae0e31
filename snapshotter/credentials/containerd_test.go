package credentials

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"
)

// skip skips the test, unless LAZULI_CI is set: there the machine has everything.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("LAZULI_CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// containerd starts a containerd with CRI of its own and returns its socket.
func containerd(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "needs root")
	}
	program, err := exec.LookPath("containerd")
	if err != nil {
		skip(t, "needs the program containerd: %v", err)
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "containerd.sock")
	must(t, os.WriteFile(filepath.Join(dir, "config.toml"), fmt.Appendf(nil, `version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart",
	"io.containerd.monitor.v1.cgroups", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
address = %q
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
conf_dir = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket, filepath.Join(dir, "cni")), 0o600))
	out, err := os.Create(filepath.Join(dir, "log"))
	must(t, err)
	defer out.Close()
	cmd := exec.Command(program, "--config", filepath.Join(dir, "config.toml"))
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(out.Name())
			t.Logf("containerd's log:\n%s", b)
		}
	})
	return socket
}

// locked serves a registry with one image, app:1, that wants a login, and returns its host.
func locked(t testing.TB, user authn.AuthConfig) string {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user.Username || p != user.Password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	host := strings.TrimPrefix(s.URL, "http://")
	img, err := random.Image(1000, 1)
	must(t, err)
	config, err := img.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", goruntime.GOARCH
	img, err = mutate.ConfigFile(img, config)
	must(t, err)
	ref, err := name.ParseReference(host + "/app:1")
	must(t, err)
	must(t, remote.Write(ref, img, remote.WithAuth(authn.FromConfig(user))))
	return host
}

// TestContainerd: pulls through the proxy by a real containerd, from a registry that wants a login.
func TestContainerd(t *testing.T) {
	clean(t)
	user := authn.AuthConfig{Username: "user", Password: "pass:word"}
	image := locked(t, user) + "/app:1"
	k := open(t, t.TempDir())
	conn := dial(t, proxied(t, k, containerd(t)), raw...)
	const service = "/runtime.v1.ImageService/"
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err := call(t.Context(), conn, service+"ListImages", nil)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("containerd does not come: %v", err)
		}
	}
	ref, err := name.ParseReference(image)
	must(t, err)
	for _, test := range []struct {
		pull
		ok bool
	}{
		{pull{image: image}, false},
		{pull{image: image, username: "user", password: "wrong"}, false},
		{pull{image: image, username: "user", password: "pass:word", serverAddress: "https://other.example.com"}, false},
		{pull{image: image, username: "user", password: "pass:word", serverAddress: "http://" + ref.Context().RegistryStr()}, true},
		{pull{image: image, username: "user", password: "wrong"}, false},
	} {
		before := resolve(t, k, ref.Context().Name())
		answer, err := call(t.Context(), conn, service+"PullImage", test.encode())
		if (err == nil) != test.ok {
			t.Fatalf("%+v: %q, %v", test, answer, err)
		}
		want := before
		if test.ok {
			want = user
		}
		if got := resolve(t, k, ref.Context().Name()); got != want {
			t.Errorf("%+v: kept is %+v, want %+v", test, got, want)
		}
	}
	// What is kept opens the registry to the daemon, after a restart too.
	if _, err := remote.Get(ref, remote.WithAuthFromKeychain(open(t, k.dir))); err != nil {
		t.Errorf("with what was kept: %v", err)
	}
	if list, err := call(t.Context(), conn, service+"ListImages", nil); err != nil || !strings.Contains(string(list), image) {
		t.Errorf("containerd's images are %q, %v", list, err)
	}
	// containerd says itself what is wrong with a request.
	if _, err := call(t.Context(), conn, service+"PullImage", []byte("\xff")); err == nil || !strings.Contains(err.Error(), "unmarshal") {
		t.Errorf("a broken request: %v", err)
	}
}
