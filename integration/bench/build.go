package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Programs are paths of what is measured.
type Programs struct {
	Lazuli, Containerd, Ctr, Peers, Read string
}

// need says what is missing on this machine.
func need() error {
	if os.Geteuid() != 0 {
		return errors.New("needs root, for namespaces and mounts")
	}
	for _, program := range []string{"ip", "docker-registry", "runc"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("needs the program %s: %w", program, err)
		}
	}
	for _, device := range []string{"/dev/net/tun", "/dev/fuse"} {
		if _, err := os.Stat(device); err != nil {
			return fmt.Errorf("needs %w", err)
		}
	}
	return nil
}

// cacheDir is where things stay that take long to make: LAZULI_CACHE, or lazuli in the user's cache directory.
func cacheDir() (string, error) {
	dir := os.Getenv("LAZULI_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(user, "lazuli")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o755)
}

// module is the root of Lazuli's module, which the program is started in.
func module() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Path}} {{.Dir}}").Output()
	path, dir, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil || path != "lazuli" {
		return "", errors.New("start it in Lazuli's own folder: it builds what it measures")
	}
	return dir, nil
}

// build builds the programs, but for lazuli if one is given. containerd stays in the cache, as the tests leave it there.
func build(ctx context.Context, cache, lazuli string) (p Programs, err error) {
	root, err := module()
	if err != nil {
		return p, err
	}
	say("building")
	bin := filepath.Join(cache, "bench", "bin")
	p.Lazuli, p.Peers, p.Read = filepath.Join(bin, "lazuli"), filepath.Join(bin, "peers"), filepath.Join(bin, "read")
	static := func(dir, output, pkg string) error {
		return run(ctx, "env", "CGO_ENABLED=0", "go", "build", "-C", dir, "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", output, pkg)
	}
	err = locked(bin+".lock", func() error {
		err := static(filepath.Join(root, "integration", "peers"), p.Peers, ".")
		if err == nil {
			err = static(root, p.Read, "./integration/bench/read")
		}
		if err == nil && lazuli == "" {
			err = static(root, p.Lazuli, "./cmd/lazuli")
		}
		return err
	})
	if err != nil {
		return p, err
	}
	if lazuli != "" {
		if p.Lazuli, err = filepath.Abs(lazuli); err != nil {
			return p, err
		}
		if err := run(ctx, p.Lazuli, "version"); err != nil {
			return p, err
		}
	}
	tools, err := containerd(ctx, root, cache)
	p.Containerd, p.Ctr = filepath.Join(tools, "containerd"), filepath.Join(tools, "ctr")
	return p, err
}

// containerd returns the folder of containerd's programs, which deploy/tools.sh builds if they are not there.
func containerd(ctx context.Context, root, cache string) (string, error) {
	c := exec.CommandContext(ctx, filepath.Join(root, "deploy", "tools.sh"), "containerd")
	c.Env = append(os.Environ(), "LAZULI_CACHE="+cache)
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("deploy/tools.sh containerd: %w", errors.Join(err, ctx.Err()))
	}
	return strings.TrimSpace(string(out)), nil
}

// locked calls f while no other process does so with the same lock.
func locked(lock string, f func() error) error {
	if err := os.MkdirAll(filepath.Dir(lock), 0o755); err != nil {
		return err
	}
	l, err := os.OpenFile(lock, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock, err)
	}
	return f()
}

// run runs a program to its end. The error says what it wrote.
func run(ctx context.Context, program string, args ...string) error {
	_, err := output(ctx, program, args...)
	return err
}

// output is run, and returns what the program writes to its standard output.
func output(ctx context.Context, program string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, program, args...)
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return "", fmt.Errorf("%s %q: %w\n%s", filepath.Base(program), args, errors.Join(err, ctx.Err()), &stderr)
	}
	return stdout.String(), nil
}
