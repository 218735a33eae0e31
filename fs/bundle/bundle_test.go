package bundle

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// tree makes a root with a few programs and users, and links that lead out.
func tree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range map[string]string{
		"bin/sh":         "#!",
		"bin/noexec":     "",
		"opt/tool":       "#!",
		"etc/passwd":     "root:x:0:0::/root:/bin/sh\njob:x:1000:100::/home/job:/bin/sh\n",
		"etc/group":      "root:x:0:\nusers:x:100:\nextra:x:77:job\n",
		"home/job/.keep": "",
	} {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if content == "#!" {
			mode = 0o755
		}
		if err := os.WriteFile(p, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	// As seen from the container, this is /bin/sh; as seen from the host, it is the host's.
	if err := os.Symlink("/bin", filepath.Join(root, "usrbin")); err != nil {
		t.Fatal(err)
	}
	return root
}

func image(cmd ...string) *v1.ConfigFile { return &v1.ConfigFile{Config: v1.Config{Cmd: cmd}} }

func TestConfigProcess(t *testing.T) {
	root := tree(t)
	im := &v1.ConfigFile{Config: v1.Config{
		Entrypoint: []string{"sh", "-c"}, Cmd: []string{"true"},
		Env:  []string{"A=image", "B=image", "PATH=/opt:/bin", "malformed"},
		User: "job", WorkingDir: "/srv/../work",
	}}
	s, err := Config(im, root, Options{Args: []string{"exit 3"}, Env: []string{"B=user", "C=a=b"}})
	if err != nil {
		t.Fatal(err)
	}
	got := *s.Process
	got.Capabilities, got.Rlimits = nil, nil
	want := specs.Process{
		Args:            []string{"sh", "-c", "exit 3"},
		Env:             []string{"PATH=/opt:/bin", "HOME=/home/job", "A=image", "B=user", "C=a=b"},
		Cwd:             "/work",
		User:            specs.User{UID: 1000, GID: 100, AdditionalGids: []uint32{77}},
		NoNewPrivileges: true,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("process (-want +got):\n%s", d)
	}
	if c := s.Process.Capabilities; len(c.Effective)+len(c.Permitted)+len(c.Ambient)+len(c.Inheritable) != 0 {
		t.Errorf("capabilities of a user: %v, want none but the bound", c)
	}
	if s, err := Config(im, root, Options{User: "0:users"}); err != nil {
		t.Error(err)
	} else if s.Process.User.GID != 100 || len(s.Process.Capabilities.Effective) == 0 {
		t.Errorf("0:users: %+v %v", s.Process.User, s.Process.Capabilities.Effective)
	}
}

func TestConfigErrors(t *testing.T) {
	root := tree(t)
	for _, tt := range []struct {
		name string
		im   *v1.ConfigFile
		o    Options
		code int    // of a StartError, else 0
		want string // in the message
	}{
		{"no command", image(), Options{}, 127, "names no command"},
		{"not in PATH", image("nothing"), Options{}, 127, "nothing"},
		{"not there", image("/bin/nothing"), Options{}, 127, "/bin/nothing"},
		{"directory", image("/bin"), Options{}, 126, "is a directory"},
		{"mode", image("noexec"), Options{}, 126, "not executable"},
		{"relative", image("./tool"), Options{Dir: "/etc"}, 127, "/etc/tool"},
		{"user", image("sh"), Options{User: "nobody"}, 0, `user "nobody"`},
		{"group", image("sh"), Options{User: "job:nogroup"}, 0, `user "job:nogroup"`},
		{"read-only", image("sh"), Options{ReadOnly: true}, 0, "mount point /proc"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Config(tt.im, root, tt.o)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want one with %q", err, tt.want)
			}
			var se *StartError
			if code := 0; errors.As(err, &se) {
				code = se.Code
				if code != tt.code {
					t.Errorf("code %d, want %d", code, tt.code)
				}
			} else if tt.code != 0 {
				t.Errorf("no StartError, want code %d", tt.code)
			}
		})
	}
	for _, ok := range []struct{ cmd, dir string }{{"/usrbin/sh", ""}, {"./tool", "/opt"}, {"../bin/sh", "/etc"}} {
		if _, err := Config(image(ok.cmd), root, Options{Dir: ok.dir}); err != nil {
			t.Errorf("%s in %q: %v", ok.cmd, ok.dir, err)
		}
	}
}

// A link in the image must not make the host's files count as the image's.
func TestConfigStaysInRoot(t *testing.T) {
	root := tree(t)
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "passwd"), []byte("evil:x:0:0::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(outside, "tool"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(root, "etc/passwd"))
	if err := os.Symlink(filepath.Join(outside, "passwd"), filepath.Join(root, "etc/passwd")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(root, "out")); err != nil {
		t.Fatal(err)
	}
	if _, err := Config(image("sh"), root, Options{User: "evil"}); err == nil {
		t.Error("a user of the host's file was found")
	}
	var se *StartError
	if _, err := Config(image("/out/tool"), root, Options{}); !errors.As(err, &se) || se.Code != 127 {
		t.Errorf("/out/tool: %v, want not found", err)
	}
}

// A passwd that is a fifo must not block, nor one that is huge be read.
func TestConfigHostilePasswd(t *testing.T) {
	root := tree(t)
	p := filepath.Join(root, "etc/passwd")
	if err := os.Truncate(p, 1<<40); err != nil {
		t.Fatal(err)
	}
	if _, err := Config(image("sh"), root, Options{}); err == nil || !strings.Contains(err.Error(), "/etc/passwd") {
		t.Errorf("1 TiB passwd: %v", err)
	}
	os.Remove(p)
	if err := mkfifo(p); err != nil {
		t.Fatal(err)
	}
	if _, err := Config(image("sh"), root, Options{}); err == nil || !strings.Contains(err.Error(), "/etc/passwd") {
		t.Errorf("fifo passwd: %v", err)
	}
}

func TestParseBind(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.WriteFile("f", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		in   string
		want Bind
		err  bool
	}{
		{in: dir + ":/a/../b/", want: Bind{dir, "/b", false}},
		{in: "f:/b:ro", want: Bind{filepath.Join(dir, "f"), "/b", true}},
		{in: "f:/b:rw", want: Bind{filepath.Join(dir, "f"), "/b", false}},
		{in: "f:b", err: true}, {in: "f:/", err: true}, {in: "f", err: true}, {in: ":/b", err: true},
		{in: "f:/b:rx", err: true}, {in: "missing:/b", err: true},
	} {
		got, err := ParseBind(tt.in)
		if (err != nil) != tt.err || got != tt.want {
			t.Errorf("ParseBind(%q) = %+v, %v", tt.in, got, err)
		}
	}
}
