package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// rootDir is the container's root, in which the kernel resolves paths as the
// container will.
type rootDir struct {
	path string
	fd   int
}

func openRoot(dir string) (*rootDir, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("root %s: %w", dir, err)
	}
	return &rootDir{dir, fd}, nil
}

func (r *rootDir) Close() error { return unix.Close(r.fd) }

func (r *rootDir) open(name string, flags int) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(r.fd, name, &how)
		// EAGAIN: a rename somewhere raced with the walk (openat2(2)).
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

// stat follows links, within the root. It opens nothing, so it fetches nothing.
func (r *rootDir) stat(name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := r.open(name, unix.O_PATH)
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	return st, unix.Fstat(fd, &st)
}

func (r *rootDir) exists(name string) bool {
	_, err := r.stat(name)
	return err == nil
}

// maxDatabase bounds /etc/passwd and /etc/group, which are read into memory.
const maxDatabase = 16 << 20

// database reads /etc/passwd or /etc/group; one that is missing is empty.
func (r *rootDir) database(name string) ([]byte, error) {
	st, err := r.stat(name)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxDatabase {
		return nil, fmt.Errorf("%s: want a regular file of at most %d bytes", name, maxDatabase)
	}
	fd, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxDatabase))
}

// user resolves what "-u" and the image's config accept, with the user's home.
func (r *rootDir) user(spec string) (u specs.User, home string, err error) {
	// Side by side: in a lazy root each is a round trip.
	var group []byte
	var groupErr error
	done := make(chan struct{})
	go func() {
		defer close(done)
		group, groupErr = r.database("/etc/group")
	}()
	passwd, err := r.database("/etc/passwd")
	<-done
	if err := errors.Join(err, groupErr); err != nil {
		return u, "", err
	}
	eu, err := user.GetExecUser(spec, &user.ExecUser{Home: "/"}, bytes.NewReader(passwd), bytes.NewReader(group))
	switch {
	case errors.Is(err, user.ErrNoPasswdEntries):
		return u, "", fmt.Errorf("user %q: no such user in the image's /etc/passwd: use a number or another name", spec)
	case errors.Is(err, user.ErrNoGroupEntries):
		return u, "", fmt.Errorf("user %q: no such group in the image's /etc/group: use a number or another name", spec)
	case err != nil:
		return u, "", fmt.Errorf("user %q: %w", spec, err)
	}
	if eu.Uid < 0 || int64(eu.Uid) > math.MaxUint32-1 || eu.Gid < 0 || int64(eu.Gid) > math.MaxUint32-1 {
		return u, "", fmt.Errorf("user %q: ids go from 0 to %d", spec, int64(math.MaxUint32-1))
	}
	u.UID, u.GID = uint32(eu.Uid), uint32(eu.Gid)
	for _, g := range eu.Sgids {
		if g >= 0 && int64(g) < math.MaxUint32 {
			u.AdditionalGids = append(u.AdditionalGids, uint32(g))
		}
	}
	home = eu.Home
	if home == "" || strings.ContainsAny(home, "\x00\n") {
		home = "/"
	}
	return u, home, nil
}

// command reports why name cannot be run, as execvp would find out, if it is
// certain. With binds it may come from there: then the runtime finds out.
func (r *rootDir) command(name, dir, searchPath string, binds []Bind) error {
	if len(binds) > 0 {
		return nil
	}
	_, err := r.find(name, dir, searchPath)
	return err
}

// find returns the file that execvp would take for name.
func (r *rootDir) find(name, dir, searchPath string) (string, error) {
	var candidates []string
	if strings.Contains(name, "/") {
		if !path.IsAbs(name) {
			name = path.Join(dir, name)
		}
		candidates = []string{name}
	} else {
		for _, d := range strings.Split(searchPath, ":") {
			if !path.IsAbs(d) {
				d = path.Join(dir, d)
			}
			candidates = append(candidates, path.Join(d, name))
		}
	}
	found := error(&StartError{Code: 127, Err: fmt.Errorf("command %q: not found in the image", name)})
	if !strings.Contains(name, "/") {
		found = &StartError{Code: 127, Err: fmt.Errorf("command %q: not found in the image's PATH (%s)", name, searchPath)}
	}
	for _, c := range candidates {
		st, err := r.stat(c)
		switch {
		case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
		case err != nil:
			found = &StartError{Code: 126, Err: fmt.Errorf("command %q: %w", c, err)}
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			found = &StartError{Code: 126, Err: fmt.Errorf("command %q: is a directory", c)}
		case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0:
			found = &StartError{Code: 126, Err: fmt.Errorf("command %q: is not executable (mode %#o)", c, st.Mode&0o7777)}
		default:
			return c, nil
		}
	}
	return "", found
}

// checkReadOnly names the first mount point or directory that a root without a
// writable layer does not have.
func (r *rootDir) checkReadOnly(mounts []specs.Mount, dir string) error {
	covered := func(name string, n int) bool {
		for _, m := range mounts[:n] {
			if name == m.Destination || strings.HasPrefix(name, m.Destination+"/") {
				return true
			}
		}
		return false
	}
	for i, m := range mounts {
		if !covered(m.Destination, i) && !r.exists(m.Destination) {
			return fmt.Errorf("mount point %s: not in the image, and a read-only root cannot have it made: run with a writable layer", m.Destination)
		}
	}
	if !covered(dir, len(mounts)) && !r.exists(dir) {
		return fmt.Errorf("working directory %s: not in the image, and a read-only root cannot have it made: run with a writable layer", dir)
	}
	return nil
}
