package install

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// skip skips the test, unless LAZULI_CI is set: there the machine has everything.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("LAZULI_CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// old is a containerd 1.x, new2 one of 2.x.
func old(t testing.TB) string { return program(t, "/usr/bin/containerd", "1") }

func new2(t testing.TB) string {
	p := os.Getenv("LAZULI_CONTAINERD")
	if p == "" {
		p, _ = exec.LookPath("containerd")
	}
	return program(t, p, "2")
}

func program(t testing.TB, path, major string) string {
	t.Helper()
	out, _ := exec.Command(path, "--version").Output()
	if f := strings.Fields(string(out)); len(f) < 3 || !strings.HasPrefix(strings.TrimPrefix(f[2], "v"), major+".") {
		if major == "2" {
			// Not a matter of CI: integration runs the whole with containerd 2.x, which it builds.
			t.Skipf("needs containerd 2.x: set LAZULI_CONTAINERD to its path (%q says %q)", path, out)
		}
		skip(t, "needs containerd %s.x: %s says %q", major, path, out)
	}
	return path
}

// node makes a directory that stands for / with a containerd and its files.
func node(t testing.TB, containerd string, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "usr/bin"), 0o755))
	must(t, os.Symlink(containerd, filepath.Join(dir, "usr/bin/containerd")))
	for path, content := range files {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, path), []byte(content), 0o640))
	}
	return dir
}

// treeOf is all that lies below dir: modes, and contents of files.
func treeOf(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		must(t, err)
		info, err := d.Info()
		must(t, err)
		s := info.Mode().String()
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			must(t, err)
			s += "\n" + string(b)
		}
		out[strings.TrimPrefix(path, dir)] = s
		return nil
	}))
	return out
}

func run(t testing.TB, f func(context.Context, *bytes.Buffer) error) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := f(t.Context(), &out)
	return out.String(), err
}

func installs(t testing.TB, o Options) string {
	t.Helper()
	out, err := run(t, func(ctx context.Context, w *bytes.Buffer) error { return Install(ctx, w, o) })
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

func uninstalls(t testing.TB, o Options) string {
	t.Helper()
	out, err := run(t, func(ctx context.Context, w *bytes.Buffer) error { return Uninstall(ctx, w, o) })
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// effective is what containerd makes of the configuration below dir.
func effective(t testing.TB, dir string) tree {
	t.Helper()
	c, err := find(t.Context(), dir)
	must(t, err)
	files, err := c.load(nil)
	must(t, err)
	dump, err := c.dump(t.Context(), files)
	must(t, err)
	return dump
}

// What containerd's main file may look like, and what else lies there.
var configurations = []struct {
	name  string
	files map[string]string
	old   bool // containerd 1.x can read it
	noCRI bool
}{
	{name: "none", old: true},
	{name: "debian", old: true, files: map[string]string{mainFile: `version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.example.com/pause:1"
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"`}},
	{name: "docker", old: true, noCRI: true, files: map[string]string{mainFile: "#   Copyright\n\ndisabled_plugins = [\"cri\"]\n\n#root = \"/var/lib/containerd\"\n"}},
	{name: "version 1", old: true, files: map[string]string{mainFile: "[plugins.cri]\nsandbox_image = \"registry.example.com/pause:1\"\n"}},
	{name: "empty imports", old: true, files: map[string]string{mainFile: "version = 2\nimports = []\nroot = \"/data\"\n[debug]\nlevel = \"warn\"\n"}},
	{name: "imports of files", old: true, files: map[string]string{
		mainFile:                   "version = 2\nimports = ['/etc/containerd/a.toml', '/etc/containerd/b.toml'] # two\noom_score = -1\n",
		"/etc/containerd/a.toml":   "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'registry.example.com/pause:1'\n",
		"/etc/containerd/b.toml":   "version = 2\n[proxy_plugins.other]\ntype = 'snapshot'\naddress = '/run/other.sock'\n",
		"/etc/containerd/conf.d/x": "never read",
	}},
	{name: "imports of a folder", old: true, files: map[string]string{
		mainFile: "version = 2\nimports = [\n  \"/etc/containerd/config.d/*.toml\",\n]\n",
		"/etc/containerd/config.d/runtime.toml": `version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "other"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.other]
runtime_type = "io.containerd.runc.v2"
`}},
	{name: "3", files: map[string]string{mainFile: `version = 3
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.example.com/pause:1"
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_downloads = 7
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux/amd64"
    snapshotter = "native"
`}},
	{name: "4", files: map[string]string{
		mainFile: "version = 4\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n",
		"/etc/containerd/conf.d/20-other.toml": "version = 4\n[proxy_plugins.other]\ntype = 'snapshot'\naddress = '/run/other.sock'\n" +
			"[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = 'linux'\nsnapshotter = 'other'\n"}},
}

// each runs f on a node of each kind with each containerd that reads it.
func each(t *testing.T, f func(t *testing.T, dir string, noCRI bool)) {
	for _, c := range configurations {
		t.Run("2/"+c.name, func(t *testing.T) { t.Parallel(); f(t, node(t, new2(t), c.files), c.noCRI) })
		if c.old {
			t.Run("1/"+c.name, func(t *testing.T) { t.Parallel(); f(t, node(t, old(t), c.files), c.noCRI) })
		}
	}
}

// What is installed has its effect, changes nothing else, is the same the second time, and is gone without a trace.
func TestInstall(t *testing.T) {
	each(t, func(t *testing.T, dir string, noCRI bool) {
		before, was := treeOf(t, dir), effective(t, dir)
		o := Options{DestDir: dir, CRI: !noCRI, Socket: "/run/l.sock"}

		o.DryRun = true
		dry := installs(t, o)
		if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
			t.Fatalf("a dry run changed:\n%s", d)
		}
		o.DryRun = false
		said := installs(t, o)
		for _, l := range lines([]byte(said)) {
			if !strings.Contains(dry, l) && !strings.HasPrefix(l, "not enabled yet") {
				t.Errorf("a dry run did not say %q", l)
			}
		}
		for _, want := range []string{"+ [proxy_plugins]", "+ ExecStart=/usr/local/bin/lazuli daemon"} {
			if !strings.Contains(strings.Join(strings.Fields(dry), " "), strings.Join(strings.Fields(want), " ")) {
				t.Errorf("a dry run does not show %q:\n%s", want, dry)
			}
		}

		is := effective(t, dir)
		if got := at(is, "proxy_plugins", "lazuli", "address"); got != "/run/l.sock" {
			t.Errorf("the snapshotter's address is %v", got)
		}
		var snapshotters []any
		for _, u := range asList(at(is, "plugins", transfer, "unpack_config")) {
			snapshotters = append(snapshotters, at(u, "snapshotter"))
		}
		for _, u := range asList(at(was, "plugins", transfer, "unpack_config")) {
			if !slices.Contains(snapshotters, at(u, "snapshotter")) {
				t.Errorf("the transfer service does not unpack for %v any more: %v", at(u, "snapshotter"), snapshotters)
			}
		}
		if at(is, "plugins", criImages) != nil {
			if !slices.Contains(snapshotters, any("lazuli")) {
				t.Errorf("the transfer service unpacks for %v", snapshotters)
			}
			if at(is, "proxy_plugins", "lazuli", "exports", "enable_remote_snapshot_annotations") != "true" {
				t.Errorf("the transfer service does not tell the snapshotter about layers: %v", at(is, "proxy_plugins"))
			}
		}
		for _, keys := range [][]string{
			{"plugins", criImages, "pinned_images", "sandbox"}, {"plugins", criV2, "sandbox_image"},
			{"plugins", criV2, "containerd", "default_runtime_name"}, {"plugins", criV2, "containerd", "runtimes", "other", "runtime_type"},
			{"plugins", criV2, "cni", "bin_dir"}, {"plugins", transfer, "max_concurrent_downloads"}, {"proxy_plugins", "other", "address"}, {"root"}, {"oom_score"},
		} {
			if a, b := at(was, keys...), at(is, keys...); !cmp.Equal(a, b) {
				t.Errorf("%v was %v, is %v", keys, a, b)
			}
		}
		if !noCRI {
			section, _ := at(is, "plugins", criImages).(tree)
			if section == nil {
				section, _ = at(is, "plugins", criV2, "containerd").(tree)
				if section["disable_snapshot_annotations"] != false {
					t.Error("CRI does not tell the snapshotter about layers")
				}
			}
			if section["snapshotter"] != "lazuli" {
				t.Errorf("CRI uses %v", section["snapshotter"])
			}
		}

		after := treeOf(t, dir)
		for _, l := range lines([]byte(installs(t, o))) {
			if !strings.HasPrefix(l, "unchanged ") && !strings.HasPrefix(l, "found ") && !strings.HasPrefix(l, "not enabled yet") {
				t.Errorf("the second time: %s", l)
			}
		}
		if d := cmp.Diff(after, treeOf(t, dir)); d != "" {
			t.Errorf("the second time changed:\n%s", d)
		}

		o.DryRun = true
		uninstalls(t, o)
		if d := cmp.Diff(after, treeOf(t, dir)); d != "" {
			t.Errorf("a dry run of uninstall changed:\n%s", d)
		}
		o.DryRun = false
		uninstalls(t, o)
		if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
			t.Errorf("uninstall left (-before +after):\n%s", d)
		}
		if out := uninstalls(t, o); out != "nothing is installed here\n" {
			t.Errorf("the second uninstall said:\n%s", out)
		}
	})
}

func asList(v any) []any {
	l, _ := v.([]any)
	return l
}

// Each step can be the one that fails. Then nothing is changed.
func TestInstallUndoes(t *testing.T) {
	dir := node(t, old(t), map[string]string{mainFile: "version = 2\nimports = []\n"})
	before := treeOf(t, dir)
	p, err := planInstall(t.Context(), must1(Options{DestDir: dir}.withDefaults()))
	must(t, err)
	for n := range p.steps {
		err := carryOut(&endsAfter{t.Context(), n}, io.Discard, false, p.steps)
		if n == len(p.steps)-1 {
			// The first step only says something.
			must(t, err)
			if d := cmp.Diff(before, treeOf(t, dir)); d == "" {
				t.Error("all steps changed nothing")
			}
			return
		}
		if !errors.Is(err, errEnded) {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
			t.Fatalf("step %d failed, and left (-before +after):\n%s", n, d)
		}
	}
}

// systemd is told what there is to do, in order, and a daemon that does not come up leaves nothing.
func TestSystemd(t *testing.T) {
	// A systemctl that notes what it is asked, and answers no to the words in a file.
	bin := t.TempDir()
	must(t, os.WriteFile(bin+"/systemctl", []byte("#!/bin/sh\necho \"$@\" >> $0.log\n! grep -qxF -- \"$1\" $0.no\n"), 0o755))
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	no := func(words string) { must(t, os.WriteFile(bin+"/systemctl.no", []byte(words), 0o644)) }
	asked := func() []string {
		b, err := os.ReadFile(bin + "/systemctl.log")
		must(t, err)
		must(t, os.Remove(bin+"/systemctl.log"))
		return slices.DeleteFunc(lines(b), func(l string) bool { return strings.HasPrefix(l, "is-") })
	}
	dir := node(t, old(t), nil)
	before := treeOf(t, dir)
	o := Options{DestDir: dir, Restart: true, systemd: true}

	no("enable\nis-enabled\nis-active\n")
	_, err := run(t, func(ctx context.Context, w *bytes.Buffer) error { return Install(ctx, w, o) })
	if err == nil || !strings.Contains(err.Error(), "systemctl enable --now lazuli.service") {
		t.Errorf("%v", err)
	}
	if d := cmp.Diff([]string{"daemon-reload", "enable --now lazuli.service", "disable --now lazuli.service", "daemon-reload"}, asked()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}

	no("restart\nis-enabled\nis-active\n")
	if _, err := run(t, func(ctx context.Context, w *bytes.Buffer) error { return Install(ctx, w, o) }); err == nil {
		t.Error("containerd did not start")
	}
	if d := cmp.Diff([]string{"daemon-reload", "enable --now lazuli.service", "restart containerd.service",
		"disable --now lazuli.service", "daemon-reload", "restart containerd.service"}, asked()); d != "" {
		t.Error(d)
	}

	no("is-enabled\nis-active\n")
	installs(t, o)
	if d := cmp.Diff([]string{"daemon-reload", "enable --now lazuli.service", "restart containerd.service"}, asked()); d != "" {
		t.Error(d)
	}
	// Another program is there now.
	must(t, os.WriteFile(filepath.Join(dir, "/usr/local/bin/lazuli"), []byte("older"), 0o755))
	no("")
	o.Restart = false
	installs(t, o)
	if d := cmp.Diff([]string{"reload lazuli.service"}, asked()); d != "" {
		t.Error(d)
	}
	uninstalls(t, o)
	if d := cmp.Diff([]string{"disable --now lazuli.service", "daemon-reload"}, asked()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
		t.Errorf("left behind:\n%s", d)
	}
}

var errEnded = errors.New("ended by the test")

// An endsAfter is a context that ends when its error was asked for n times.
type endsAfter struct {
	context.Context
	n int
}

func (e *endsAfter) Err() error {
	if e.n--; e.n < 0 {
		return errEnded
	}
	return nil
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// What may not be touched is not, and the words say what to do.
func TestInstallRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		link  string
		o     Options
		want  []string
	}{
		{name: "imports over lines", files: map[string]string{mainFile: "version = 2\nimports = [\n  '/etc/containerd/a.toml'\n]\n", "/etc/containerd/a.toml": ""},
			want: []string{"cannot be changed safely", importPattern}},
		{name: "another's drop-in", files: map[string]string{dropInFile: "version = 2\n"}, want: []string{dropInFile, "move it away"}},
		{name: "another's unit", files: map[string]string{unitFile: "[Unit]\n"}, want: []string{unitFile, "move it away"}},
		{name: "broken", files: map[string]string{mainFile: "version = 2\nroot = 7\n"}, want: []string{"does not accept its configuration as it is now"}},
		{name: "not TOML", files: map[string]string{mainFile: "version = = 2\n"}, want: []string{mainFile}},
		{name: "a link", files: map[string]string{"/etc/containerd/real.toml": "version = 2\n"}, link: mainFile, want: []string{"symbolic link", importPattern}},
		{name: "no CRI", files: map[string]string{mainFile: "version = 2\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n"}, o: Options{CRI: true},
			want: []string{"disabled", "--cri"}},
		{name: "overridden", files: map[string]string{
			mainFile:                          "version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n",
			"/etc/containerd/conf.d/zzz.toml": "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'native'\n"},
			o: Options{CRI: true}, want: []string{"would use the snapshotter native", "--no-containerd", "snapshotter = 'lazuli'"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := node(t, old(t), c.files)
			if c.link != "" {
				must(t, os.Symlink("real.toml", filepath.Join(dir, c.link)))
			}
			before := treeOf(t, dir)
			c.o.DestDir = dir
			_, err := run(t, func(ctx context.Context, w *bytes.Buffer) error { return Install(ctx, w, c.o) })
			for _, want := range c.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v: want %q", err, want)
				}
			}
			if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
				t.Errorf("changed:\n%s", d)
			}
		})
	}
}

// What the user changed meanwhile stays, and the copy of before too.
func TestUninstallKeepsChanges(t *testing.T) {
	dir := node(t, old(t), map[string]string{mainFile: "version = 2\n"})
	installs(t, Options{DestDir: dir})
	main := filepath.Join(dir, mainFile)
	b, err := os.ReadFile(main)
	must(t, err)
	must(t, os.WriteFile(main, append(b, "oom_score = -5\n"...), 0o640))
	must(t, os.WriteFile(filepath.Join(dir, "/var/lib/lazuli/object"), nil, 0o600))
	out := uninstalls(t, Options{DestDir: dir})
	b, err = os.ReadFile(main)
	must(t, err)
	if string(b) != "version = 2\noom_score = -5\n" {
		t.Errorf("the main file is now:\n%s", b)
	}
	for _, kept := range []string{backupFile, "/var/lib/lazuli"} {
		if !strings.Contains(out, "kept "+filepath.Join(dir, kept)) {
			t.Errorf("%s was not kept:\n%s", kept, out)
		}
	}
	uninstalls(t, Options{DestDir: dir, Purge: true})
	if _, err := os.Stat(filepath.Join(dir, "/var/lib/lazuli")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("--purge: %v", err)
	}
}

// A mount is not removed through.
func TestPurgeRefusesMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "needs root")
	}
	dir := node(t, old(t), nil)
	installs(t, Options{DestDir: dir})
	before := treeOf(t, dir)
	point := filepath.Join(dir, "/var/lib/lazuli/a b")
	must(t, os.Mkdir(point, 0o755))
	must(t, unix.Mount("lazuli", point, "tmpfs", 0, ""))
	_, err := run(t, func(ctx context.Context, w *bytes.Buffer) error {
		return Uninstall(ctx, w, Options{DestDir: dir, Purge: true})
	})
	must(t, unix.Unmount(point, 0))
	if err == nil || !strings.Contains(err.Error(), point+" is still mounted") {
		t.Errorf("%v", err)
	}
	must(t, os.Remove(point))
	if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
		t.Errorf("changed:\n%s", d)
	}
}

// While a container's root is mounted, nothing is taken away.
func TestUninstallRefusesWhileContainersRun(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "needs root")
	}
	dir := node(t, old(t), nil)
	installs(t, Options{DestDir: dir})
	point, a, b := filepath.Join(dir, "/var/lib/lazuli/snapshots/1/rootfs"), t.TempDir(), t.TempDir()
	must(t, os.MkdirAll(point, 0o755))
	before := treeOf(t, dir)
	must(t, unix.Mount("lazuli", point, "overlay", unix.MS_RDONLY, "lowerdir="+a+":"+b))
	_, err := run(t, func(ctx context.Context, w *bytes.Buffer) error {
		return Uninstall(ctx, w, Options{DestDir: dir, systemd: true})
	})
	must(t, unix.Unmount(point, 0))
	if err == nil || !strings.Contains(err.Error(), point) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("%v", err)
	}
	if d := cmp.Diff(before, treeOf(t, dir)); d != "" {
		t.Errorf("changed:\n%s", d)
	}
}

// A node from which Lazuli is gone, but not its configuration, starts containerd, with CRI and all. The transfer service and CRI
// need the snapshotter to be there when they start, and what is there is a socket's name.
func TestContainerdStartsWithoutLazuli(t *testing.T) {
	for _, major := range []string{"1", "2"} {
		t.Run(major, func(t *testing.T) {
			if os.Geteuid() != 0 {
				skip(t, "needs root")
			}
			program := old
			if major == "2" {
				program = new2
			}
			path := program(t)
			own, err := os.MkdirTemp("", "lz") // a socket's path must be short
			must(t, err)
			t.Cleanup(func() { must(t, os.RemoveAll(own)) })
			main := fmt.Sprintf(`version = %[2]s
root = "%[1]s/root"
state = "%[1]s/state"
[grpc]
address = "%[1]s/c"
[plugins."io.containerd.internal.v1.opt"]
path = "%[1]s/opt"
`, own, map[string]string{"1": "2", "2": "3"}[major])
			if major == "2" {
				main += fmt.Sprintf("[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n[plugins.\"io.containerd.shim.v1.manager\"]\nsocket_dir = \"%s/s\"\n", own)
			}
			dir := node(t, path, map[string]string{mainFile: main})
			installs(t, Options{DestDir: dir, CRI: true, Socket: own + "/absent.sock"})
			is := effective(t, dir)
			delete(is, "imports")
			config, err := toml.Marshal(is)
			must(t, err)
			must(t, os.WriteFile(own+"/config.toml", config, 0o600))

			// containerd serves when all plugins are loaded; what went wrong with them is in its log.
			cmd := exec.Command(path, "--config", own+"/config.toml", "--log-level", "info")
			said, err := cmd.StderrPipe()
			must(t, err)
			must(t, cmd.Start())
			var log strings.Builder
			serves := false
			for s := bufio.NewScanner(said); s.Scan(); {
				log.WriteString(s.Text() + "\n")
				if strings.Contains(s.Text(), "containerd successfully booted") {
					serves = true
					must(t, cmd.Process.Signal(unix.SIGTERM))
				}
			}
			_ = cmd.Wait() // ended by us
			if !serves {
				t.Errorf("containerd did not start:\n%s", &log)
			}
			if !regexp.MustCompile(`Get image filesystem path .*lazuli`).MatchString(log.String()) {
				t.Errorf("CRI does not use the snapshotter:\n%s", &log)
			}
			for _, l := range lines([]byte(log.String())) {
				if (strings.Contains(l, "failed to load plugin") || strings.Contains(l, "level=fatal")) && (strings.Contains(l, "cri") || strings.Contains(l, "transfer") || strings.Contains(l, "lazuli")) {
					t.Errorf("%s", l)
				}
			}
		})
	}
}

func TestUnit(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		skip(t, "needs systemd-analyze: %v", err)
	}
	file := filepath.Join(t.TempDir(), unitName)
	must(t, os.WriteFile(file, unitText("/bin/true daemon", []string{"/x"}), 0o644))
	out, err := exec.Command("systemd-analyze", "verify", file).CombinedOutput()
	for _, l := range lines(out) {
		if strings.Contains(l, unitName) {
			t.Errorf("%s", l)
		}
	}
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	o := must1(Options{DestDir: node(t, old(t), nil), Args: []string{"--root", "/data"}}.withDefaults())
	if p, err := planInstall(t.Context(), o); err != nil || p.daemon != "/usr/local/bin/lazuli daemon --root /data" {
		t.Errorf("%v: the daemon is %q", err, p.daemon)
	}
	if got := made(unitText("/bin/true", []string{"/x", "/x/y"})); !slices.Equal(got, []string{"/x", "/x/y"}) {
		t.Errorf("made: %q", got)
	}
	if _, err := (Options{Args: []string{"--root", "/da ta"}}).withDefaults(); err == nil {
		t.Error("a blank in a command line of systemd's")
	}
}

// The block is put into any main file, and taken out of it, and nothing else is another byte.
func TestBlock(t *testing.T) {
	c := &containerd{}
	for _, main := range []string{
		"version = 2\n", "# no end of line", "\r\nversion = 2\r\n[debug]\r\n", "[plugins.x]\nimports = ['a']\n",
		"version = 2\nimports = []\n[debug]\n", "imports = [ 'a', \"b\" ] # why\nversion = 2\n", "\timports=[]\n",
		"[debug]\n", "imports = ['a']\n[plugins.x]\nimports = ['b']\n",
	} {
		_, changed, err := c.place([]byte(main))
		if err != nil {
			if strings.Count(main, "imports") < 2 {
				t.Errorf("%q: %v", main, err)
			}
			continue
		}
		if got := string(withoutBlock(changed)); got != main {
			t.Errorf("was %q, is %q", main, got)
		}
		var was, is tree
		must(t, toml.Unmarshal([]byte(main), &was))
		must(t, toml.Unmarshal(changed, &is))
		if want := append(imports(was), importPattern); !slices.Equal(imports(is), want) {
			t.Errorf("%q: imports %q, want %q", main, imports(is), want)
		}
		delete(was, "imports")
		delete(is, "imports")
		if d := cmp.Diff(was, is); d != "" {
			t.Errorf("%q means something else (-before +after):\n%s", main, d)
		}
	}
}

// CRI is told to add the annotations only where that changes nothing about how it pulls.
func TestPullsItself(t *testing.T) {
	quiet := tree{"use_local_image_pull": false, "max_concurrent_downloads": int64(3), "disable_snapshot_annotations": true, "registry": tree{"config_path": "/x"}}
	if pullsItself(quiet) {
		t.Error("the default pulls through the transfer service")
	}
	for _, change := range []tree{
		{"use_local_image_pull": true}, {"max_concurrent_downloads": int64(5)}, {"disable_snapshot_annotations": false},
		{"discard_unpacked_layers": true}, {"image_pull_with_sync_fs": true}, {"registry": tree{"mirrors": tree{"a": tree{}}}},
	} {
		section := clone(quiet).(tree)
		for k, v := range change {
			section[k] = v
		}
		if !pullsItself(section) {
			t.Errorf("with %v CRI pulls by itself", change)
		}
	}
	if !pullsItself(tree{}) {
		t.Error("containerd 2.0 pulls by itself")
	}
}
