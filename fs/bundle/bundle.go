// Package bundle runs an image's process from a root directory that is
// mounted already.
//
// In go the image's config and what the user asks for beyond it; out comes the
// OCI runtime configuration ([Config]), which an OCI runtime, runc or crun, runs
// in the foreground until the process ends ([Run]). Nothing here knows where the
// root's bytes come from: a lazy root and a plain directory are the same to it.
// What it does before the process starts reads names and modes, and of the
// files' bytes only /etc/passwd and /etc/group, because each other byte would
// cost a cold start a round trip.
//
// The root belongs to whoever built the image. Every path in it is resolved by
// the kernel inside of it (openat2 with RESOLVE_IN_ROOT), so that no link in it
// leads to a file of the host.
//
// What a container may do follows docker's defaults: its capabilities, its
// mounts, masked and read-only paths, namespaces of its own for processes, IPC,
// host name, mounts and network. Its network has the loopback device only,
// unless it shares the host's. Privileges cannot be gained by setuid programs.
//
// Sources: the OCI runtime specification
// (https://github.com/opencontainers/runtime-spec), and its exit codes as
// docker's manual has them (https://docs.docker.com/engine/containers/run/#exit-status).
package bundle

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Options is what a user asks for beyond the image's config. The zero value
// runs the image as its config says.
type Options struct {
	// Args replace the command of the image's config; its entrypoint stays.
	Args []string
	// Env is "NAME=value", above the environment of the image's config.
	Env []string
	// Dir is the working directory; empty means the one of the image's config.
	Dir string
	// User is "name", "uid", either with ":group" or ":gid"; empty means the
	// user of the image's config. Names are those of the root's /etc/passwd and /etc/group.
	User string
	// Binds are mounted in order, after what every container has.
	Binds []Bind
	// HostNetwork leaves the process in the host's network, with the host's
	// /etc/resolv.conf, /etc/hosts and host name.
	HostNetwork bool
	// ReadOnly says that the root cannot be written to, so that no mount point
	// that is missing in it can be made.
	ReadOnly bool
	// Terminal gives the process a terminal of its own.
	Terminal bool
	// Hostname of the container; empty means "lazuli", or the host's with HostNetwork.
	Hostname string
}

// A Bind is a file or directory of the host that the container sees.
type Bind struct {
	Source   string // on the host, absolute
	Target   string // in the container, absolute and clean, not "/"
	ReadOnly bool
}

// ParseBind parses "SRC:DST" or "SRC:DST:ro". A relative SRC is taken from the current
// directory. It is an error if SRC is not there.
func ParseBind(s string) (Bind, error) {
	f := strings.Split(s, ":")
	if len(f) < 2 || len(f) > 3 || f[0] == "" || (len(f) == 3 && f[2] != "ro" && f[2] != "rw") {
		return Bind{}, fmt.Errorf("bind %q: want SRC:DST or SRC:DST:ro", s)
	}
	if !path.IsAbs(f[1]) || path.Clean(f[1]) == "/" {
		return Bind{}, fmt.Errorf("bind %q: %q: want an absolute path below / in the container", s, f[1])
	}
	src, err := filepath.Abs(f[0])
	if err != nil {
		return Bind{}, fmt.Errorf("bind %q: %w", s, err)
	}
	if _, err := os.Stat(src); err != nil {
		return Bind{}, fmt.Errorf("bind %q: %w", s, err)
	}
	return Bind{Source: src, Target: path.Clean(f[1]), ReadOnly: len(f) == 3 && f[2] == "ro"}, nil
}

// A StartError says that the process never ran. Code is docker's exit code for
// it: 127 if the command was not found, 126 if it cannot be executed, 125 for everything else.
type StartError struct {
	Code int
	// Said means that the runtime has written Err to Stderr already.
	Said bool
	Err  error
}

func (e *StartError) Error() string { return e.Err.Error() }
func (e *StartError) Unwrap() error { return e.Err }

// defaultPath is the PATH of images that have none, docker's.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Config returns the runtime configuration of a container that runs image from
// root, a mounted directory. Besides names and modes it reads /etc/passwd and
// /etc/group. Errors are about what the image or the user asks for and root
// does not have; a command that cannot run is a [*StartError].
func Config(image *v1.ConfigFile, root string, o Options) (*specs.Spec, error) {
	r, err := openRoot(root)
	if err != nil {
		return nil, err
	}
	defer r.Close()

	args := slices.Concat(image.Config.Entrypoint, image.Config.Cmd)
	if len(o.Args) > 0 {
		args = slices.Concat(image.Config.Entrypoint, o.Args)
	}
	if len(args) == 0 || args[0] == "" {
		return nil, &StartError{Code: 127, Err: errors.New("the image names no command: say which to run after the image's name")}
	}

	name := o.User
	if name == "" {
		name = image.Config.User
	}
	user, home, err := r.user(name)
	if err != nil {
		return nil, err
	}

	env := environ(image.Config.Env, o.Env, home, o.Terminal)
	dir := o.Dir
	if dir == "" {
		dir = image.Config.WorkingDir
	}
	dir = path.Join("/", dir) // runc wants it absolute and clean
	if err := r.command(args[0], dir, lookup(env, "PATH"), o.Binds); err != nil {
		return nil, err
	}

	mounts := slices.Clone(standardMounts)
	namespaces := []specs.LinuxNamespace{
		{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
	}
	if cgroup2() {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	hostname := "lazuli"
	if o.HostNetwork {
		if h, err := os.Hostname(); err == nil {
			hostname = h
		}
		for _, f := range hostFiles {
			// A read-only root that lacks the file cannot show the host's.
			if _, err := os.Stat(f); err == nil && (!o.ReadOnly || r.exists(f)) {
				mounts = append(mounts, bind(Bind{Source: f, Target: f, ReadOnly: true}))
			}
		}
	} else {
		namespaces = append(namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	}
	if o.Hostname != "" {
		hostname = o.Hostname
	}
	for _, b := range o.Binds {
		mounts = append(mounts, bind(b))
	}
	if o.ReadOnly {
		if err := r.checkReadOnly(mounts, dir); err != nil {
			return nil, err
		}
	}

	caps := &specs.LinuxCapabilities{Bounding: capabilities}
	if user.UID == 0 {
		caps.Permitted, caps.Effective = capabilities, capabilities
	}
	return &specs.Spec{
		Version: "1.0.2", // all that is used here; older runtimes refuse newer ones
		Process: &specs.Process{
			Terminal:        o.Terminal,
			User:            user,
			Args:            args,
			Env:             env,
			Cwd:             dir,
			Capabilities:    caps,
			Rlimits:         []specs.POSIXRlimit{nofile()},
			NoNewPrivileges: true,
		},
		Root:     &specs.Root{Path: r.path, Readonly: o.ReadOnly},
		Hostname: hostname,
		Mounts:   mounts,
		Linux: &specs.Linux{
			Namespaces:    namespaces,
			MaskedPaths:   maskedPaths,
			ReadonlyPaths: readonlyPaths,
			// The runtime lets in the devices that every container has, null to urandom.
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
		},
	}, nil
}

// hostFiles are shown to a container that shares the host's network.
var hostFiles = []string{"/etc/resolv.conf", "/etc/hosts"}

// environ joins the image's environment with the user's, which overrides it,
// and adds what every process expects.
func environ(image, user []string, home string, terminal bool) []string {
	var env []string
	at := map[string]int{}
	add := func(kv string) {
		k, _, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return
		}
		if i, ok := at[k]; ok {
			env[i] = kv
			return
		}
		at[k] = len(env)
		env = append(env, kv)
	}
	add("PATH=" + defaultPath)
	add("HOME=" + home)
	if terminal {
		add("TERM=xterm")
	}
	for _, kv := range image {
		add(kv)
	}
	for _, kv := range user {
		add(kv)
	}
	return env
}

func lookup(env []string, name string) string {
	for _, kv := range env {
		if k, v, _ := strings.Cut(kv, "="); k == name {
			return v
		}
	}
	return ""
}

func bind(b Bind) specs.Mount {
	m := specs.Mount{Destination: b.Target, Type: "bind", Source: b.Source, Options: []string{"rbind", "rprivate", "rw"}}
	if b.ReadOnly {
		m.Options[2] = "ro"
	}
	return m
}

// nofile is the host's limit of open files, at most docker's: some programs
// close every possible descriptor when they start.
func nofile() specs.POSIXRlimit {
	const most = 1 << 20
	lim := unix.Rlimit{Cur: 1024, Max: most}
	unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) // cannot fail with these arguments
	hard := min(lim.Max, most)
	return specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: min(1024, hard), Hard: hard}
}

func cgroup2() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// standardMounts are those of the runtime specification's section on Linux, with docker's options.
var standardMounts = []specs.Mount{
	{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
	{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
	{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
	{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
	{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
	{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
}

// capabilities are docker's: enough for what package managers and servers do as root.
var capabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// maskedPaths tell of the host or reach into it.
var maskedPaths = []string{
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
	"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
	"/sys/devices/virtual/powercap", "/sys/firmware",
}

// readonlyPaths change the host when they are written to.
var readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
