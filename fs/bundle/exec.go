package bundle

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// unexecuted returns a [*StartError] if the process of spec, whose runtime ended with 1 or 255, was never executed: the
// kernel refuses to when all is set up, the runtime has said so on Stderr, and has no exit code for it. Only the
// first bytes of the command's file are read, which the kernel had to read too. nil is also for what is not certain.
func unexecuted(spec *specs.Spec) error {
	for _, m := range spec.Mounts {
		if m.Type == "bind" && !slices.Contains(hostFiles, m.Source) {
			return nil // the command may have come from there
		}
	}
	r, err := openRoot(spec.Root.Path)
	if err != nil {
		return nil
	}
	defer r.Close()
	p := spec.Process
	name, err := r.find(p.Args[0], p.Cwd, lookup(p.Env, "PATH"))
	if err != nil {
		return nil
	}
	code, why := r.refused(name, p.Cwd)
	if code == 0 {
		return nil
	}
	return &StartError{Code: code, Said: true, Err: fmt.Errorf("command %q: %s", name, why)}
}

// refused returns docker's exit code for a file that execve(2) refuses, and why it does; 0 if that is not certain.
func (r *rootDir) refused(name, dir string) (code int, why string) {
	head, err := r.head(name)
	if err != nil {
		return 0, ""
	}
	var interpreter string
	switch {
	case bytes.HasPrefix(head, []byte("#!")):
		line, _, _ := bytes.Cut(head[2:min(len(head), 256)], []byte("\n"))
		fields := strings.Fields(string(line))
		if len(fields) == 0 {
			return 126, "exec format error"
		}
		interpreter = fields[0]
	case binfmt():
		return 0, ""
	case !bytes.HasPrefix(head, []byte("\x7fELF")) || len(head) < 64 || foreign(binary.LittleEndian.Uint16(head[18:])):
		return 126, "exec format error"
	default:
		interpreter = elfInterpreter(head)
	}
	if interpreter == "" {
		return 0, ""
	}
	if !path.IsAbs(interpreter) {
		interpreter = path.Join(dir, interpreter)
	}
	st, err := r.stat(interpreter)
	switch {
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR):
		return 127, fmt.Sprintf("its interpreter %q is not in the image", interpreter)
	case err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0):
		return 126, fmt.Sprintf("its interpreter %q is not executable", interpreter)
	}
	return 0, ""
}

// head returns the first bytes of a regular file.
func (r *rootDir) head(name string) ([]byte, error) {
	st, err := r.stat(name)
	if err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s: not a regular file", name)
	}
	fd, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	b := make([]byte, min(st.Size, 4096))
	_, err = f.ReadAt(b, 0)
	return b, err
}

// foreign reports whether this machine's kernel does not know an ELF file's e_machine, of the architectures that we do.
func foreign(machine uint16) bool {
	known := map[string][]uint16{"amd64": {62, 3}, "arm64": {183, 40}}[runtime.GOARCH]
	return known != nil && !slices.Contains(known, machine)
}

// elfInterpreter returns the PT_INTERP of a 64-bit little-endian file that begins with head, or "".
func elfInterpreter(head []byte) string {
	if head[4] != 2 || head[5] != 1 {
		return ""
	}
	le := binary.LittleEndian
	at, size, n := le.Uint64(head[32:]), int(le.Uint16(head[54:])), int(le.Uint16(head[56:]))
	if size < 56 || at > uint64(len(head)) {
		return ""
	}
	for h := head[at:]; n > 0 && len(h) >= size; h, n = h[size:], n-1 {
		off, length := le.Uint64(h[8:]), le.Uint64(h[32:])
		if le.Uint32(h) == 3 && length > 1 && off < uint64(len(head)) && length <= uint64(len(head))-off {
			return string(bytes.TrimRight(head[off:off+length], "\x00"))
		}
	}
	return ""
}

// binfmt reports whether this kernel was taught other formats of executable files.
func binfmt() bool {
	entries, _ := os.ReadDir("/proc/sys/fs/binfmt_misc")
	return len(entries) > 2 // besides register and status
}
