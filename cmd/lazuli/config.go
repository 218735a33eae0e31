package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"
)

const (
	defaultRoot   = "/var/lib/lazuli"
	defaultConfig = "/etc/lazuli/config.toml"
)

// A config is what the configuration file may say. Flags override it.
type config struct {
	// Root is the folder with all that the node keeps.
	Root string `toml:"root"`
	// ReadTimeout is how long a read waits for the network before it fails. Zero is a minute.
	ReadTimeout duration `toml:"read_timeout"`
	// LogLevel is debug, info, warn or error.
	LogLevel string `toml:"log_level"`

	file  string
	level slog.Level
}

type duration struct{ time.Duration }

func (d *duration) UnmarshalText(b []byte) (err error) {
	if d.Duration, err = time.ParseDuration(string(b)); err == nil && d.Duration <= 0 {
		err = errors.New("want more than 0")
	}
	return err
}

func (c *config) flags(f *pflag.FlagSet) {
	f.StringVar(&c.Root, "root", defaultRoot, "`DIR` with all that this node keeps")
	f.StringVar(&c.file, "config", defaultConfig, "configuration `FILE` (TOML: root, read_timeout, log_level)")
	f.StringVar(&c.LogLevel, "log-level", "warn", "what to log on stderr: debug, info, warn or error")
}

// load reads the configuration file beneath what the flags said.
func (c *config) load(f *pflag.FlagSet) error {
	file := config{Root: c.Root, LogLevel: c.LogLevel}
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
	if !f.Changed("root") {
		c.Root = file.Root
	}
	if !f.Changed("log-level") {
		c.LogLevel = file.LogLevel
	}
	c.ReadTimeout = file.ReadTimeout
	if c.Root == "" {
		return &usageError{errors.New("root: want a directory, got an empty name")}
	}
	if err := c.level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return &usageError{fmt.Errorf("log level %q: want debug, info, warn or error", c.LogLevel)}
	}
	return nil
}

func (c *config) parse(b []byte) error {
	d := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	err := d.Decode(c)
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var keys []string
		for _, e := range unknown.Errors {
			keys = append(keys, strings.Join(e.Key(), "."))
		}
		return fmt.Errorf("unknown key %s: there are root, read_timeout and log_level", strings.Join(keys, ", "))
	}
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, _ := at.Position()
		return fmt.Errorf("line %d: %w", row, err)
	}
	return err
}
