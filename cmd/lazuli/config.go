package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"

	"lazuli/fs/rootfs"
)

const (
	defaultRoot   = "/var/lib/lazuli"
	defaultConfig = "/etc/lazuli/config.toml"
)

// A config is what the configuration file may say. Flags override it. [configText] says what each key is.
type config struct {
	Root        string   `toml:"root"`
	ReadTimeout duration `toml:"read_timeout"` // zero is a minute
	LogLevel    string   `toml:"log_level"`    // "" is the command's own: info for the daemon, warn for others
	HostsDir    string   `toml:"hosts_dir"`
	Socket      string   `toml:"socket"`
	MaxSize     bytesize `toml:"max_size"` // zero is a fifth of the disk
	Verify      *bool    `toml:"verify"`   // nil is true
	Learn       *bool    `toml:"learn"`    // nil is true
	Share       bool     `toml:"share"`
	Fill        string   `toml:"fill"`
	Containerd  string   `toml:"containerd"`
	Metrics     string   `toml:"metrics"`

	file  string
	level slog.Level
}

// fillPolicies are the values of the key fill.
var fillPolicies = map[string]rootfs.FillPolicy{"auto": rootfs.FillAuto, "on": rootfs.FillOn, "off": rootfs.FillOff}

// configText is a configuration file that says what holds without one.
const configText = `# Lazuli's configuration. Every key may be left out; here is what holds then.

# The folder with all that this node keeps. It should lie on a local disk with room for what jobs read of their images.
root = "/var/lib/lazuli"

# How long a read waits for the network before it fails.
read_timeout = "1m"

# debug, info, warn or error. Commands other than the daemon say "warn".
log_level = "info"

# Registries' mirrors, certificates and headers, as containerd reads them (its config_path).
hosts_dir = "/etc/containerd/certs.d"

# The daemon's socket, for containerd and as CRI image service. Beside it lie api.sock (status, metrics, profiles) and keeper.sock.
socket = "/run/lazuli/lazuli.sock"

# How much of the disk may hold what no image needs that is in use: "64GiB", "500MB". "0" is a fifth of the disk that root lies on.
max_size = "0"

# Compare each lazy layer, when all of it has arrived or while its rest is fetched, with the diffID that its image claims: see docs/security.md.
verify = true

# Write down what starts read (in root's folder profiles), and fetch that ahead when the next image of the same repository is pulled.
learn = true

# Put what was learned beside the images as startup packs, for other nodes: with credentials that may push, and at most once an hour for an image.
share = false

# Fetch the rest of the images that run, so that what runs outlives its registry. "auto": when the link has been idle for 30 seconds,
# as long as a tenth of the disk is free and the store is smaller than max_size. "on": as soon as a start has come to rest. "off": never.
# Layers that were not verified yet are verified by that (see verify).
fill = "auto"

# containerd's own socket, to which the calls of CRI's image service are passed on.
containerd = "/run/containerd/containerd.sock"

# A TCP address for Prometheus (/metrics) and /healthz, such as "127.0.0.1:9101". "" is none: api.sock has both.
metrics = ""
`

// A bytesize is a number of bytes that is written with a unit.
type bytesize int64

func (b *bytesize) UnmarshalText(text []byte) error {
	s := strings.TrimSpace(string(text))
	digits := strings.TrimRightFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	unit, ok := map[string]int64{
		"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
	}[strings.TrimSpace(s[len(digits):])]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n < 0 || n > math.MaxInt64/unit {
		return fmt.Errorf("size %q: want a number and B, kB, MB, GB, TB, KiB, MiB, GiB or TiB", s)
	}
	*b = bytesize(n * unit)
	return nil
}

type duration struct{ time.Duration }

func (d *duration) UnmarshalText(b []byte) (err error) {
	if d.Duration, err = time.ParseDuration(string(b)); err != nil || d.Duration <= 0 {
		return fmt.Errorf("duration %q: want more than 0, with a unit, such as \"30s\" or \"1m\"", b)
	}
	return nil
}

func (c *config) flags(f *pflag.FlagSet) {
	f.StringVar(&c.Root, "root", defaultRoot, "`DIR` with all that this node keeps")
	f.StringVar(&c.file, "config", defaultConfig, "configuration `FILE` (TOML; lazuli daemon --print-config shows one)")
	f.StringVar(&c.LogLevel, "log-level", "", "what to log on stderr: debug, info, warn or error (default warn, for the daemon info)")
}

// load reads the configuration file beneath what the flags said.
func (c *config) load(f *pflag.FlagSet) error {
	file := config{
		Root: c.Root, HostsDir: "/etc/containerd/certs.d", Socket: "/run/lazuli/lazuli.sock", Containerd: "/run/containerd/containerd.sock",
		Fill: "auto",
		file: c.file,
	}
	b, err := os.ReadFile(c.file)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !f.Changed("config"):
	case err != nil:
		return fmt.Errorf("configuration: %w", err)
	default:
		if err := file.parse(b); err != nil {
			return fmt.Errorf("configuration %s: %w", c.file, err)
		}
	}
	if f.Changed("root") {
		file.Root = c.Root
	}
	if f.Changed("log-level") {
		file.LogLevel = c.LogLevel
	}
	*c = file
	if c.Root == "" {
		return &usageError{errors.New("root: want a directory, got an empty name")}
	}
	return c.parseLevel("warn")
}

// parseLevel sets the log level, which is otherwise if nothing is said about it.
func (c *config) parseLevel(otherwise string) error {
	if err := c.level.UnmarshalText([]byte(cmp.Or(c.LogLevel, otherwise))); err != nil {
		return &usageError{fmt.Errorf("log level %q: want debug, info, warn or error", c.LogLevel)}
	}
	return nil
}

// unlearned reports whether nothing is to be learned from starts.
func (c *config) unlearned() bool { return c.Learn != nil && !*c.Learn }

func (c *config) parse(b []byte) error {
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err := d.Decode(c)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var keys []string
		for _, e := range unknown.Errors {
			keys = append(keys, strings.Join(e.Key(), "."))
		}
		return fmt.Errorf("unknown key %s: lazuli daemon --print-config shows those that there are", strings.Join(keys, ", "))
	}
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, _ := at.Position()
		return fmt.Errorf("line %d: %w", row, err)
	}
	if _, ok := fillPolicies[c.Fill]; !ok && err == nil {
		return fmt.Errorf("fill = %q: want auto, on or off", c.Fill)
	}
	return err
}
