package main

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
	"golang.org/x/sys/unix"
)

type object = map[string]any

// writeLayout writes an image of the given layers, lowest first, as image builders do: gzip, PAX headers, whiteouts.
func writeLayout(dir string, layers, cmd []string) error {
	tmp := dir + ".new"
	blobs := filepath.Join(tmp, "blobs", "sha256")
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(blobs, 0o755)); err != nil {
		return err
	}
	descriptors, diffIDs, history := make([]object, len(layers)), make([]string, len(layers)), make([]object, len(layers))
	errs := make([]error, len(layers))
	var wg sync.WaitGroup
	for i, l := range layers {
		wg.Go(func() {
			descriptors[i], diffIDs[i], errs[i] = writeLayer(l, blobs)
			history[i] = object{"created_by": filepath.Base(l)}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	config, err := writeBlob(blobs, "application/vnd.oci.image.config.v1+json", object{
		"architecture": "amd64", "os": "linux", "created": time.Now().UTC().Format(time.RFC3339),
		"config": object{"Cmd": cmd, "WorkingDir": "/", "Env": []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}},
		"rootfs": object{"type": "layers", "diff_ids": diffIDs}, "history": history,
	})
	if err != nil {
		return err
	}
	const mediaType = "application/vnd.oci.image.manifest.v1+json"
	manifest, err := writeBlob(blobs, mediaType, object{"schemaVersion": 2, "mediaType": mediaType, "config": config, "layers": descriptors})
	if err != nil {
		return err
	}
	manifest["platform"] = object{"architecture": "amd64", "os": "linux"}
	manifest["annotations"] = object{"org.opencontainers.image.ref.name": "latest"}
	index, err := json.Marshal(object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []object{manifest}})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(tmp, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644),
		os.WriteFile(filepath.Join(tmp, "index.json"), index, 0o644),
		os.RemoveAll(dir), os.Rename(tmp, dir))
}

// writeBlob stores v and returns its descriptor.
func writeBlob(blobs, mediaType string, v object) (object, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	name := hex.EncodeToString(sum[:])
	return object{"mediaType": mediaType, "digest": "sha256:" + name, "size": len(b)}, os.WriteFile(filepath.Join(blobs, name), b, 0o644)
}

// writeLayer stores dir, an overlayfs upper directory, as a layer.
func writeLayer(dir, blobs string) (descriptor object, diffID string, err error) {
	f, err := os.CreateTemp(blobs, "layer-")
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	blobSum, diffSum := sha256.New(), sha256.New()
	buf := bufio.NewWriterSize(io.MultiWriter(f, blobSum), 1<<20)
	zip, err := gzip.NewWriterLevel(buf, 6)
	if err != nil {
		return nil, "", err
	}
	p := &packer{dir: dir, tar: tar.NewWriter(io.MultiWriter(zip, diffSum)), names: map[uint64]string{}}
	if err := errors.Join(filepath.WalkDir(dir, p.add), p.tar.Close(), zip.Close(), buf.Flush(), f.Chmod(0o644)); err != nil {
		return nil, "", fmt.Errorf("%s: %w", dir, err)
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, "", err
	}
	digest := hex.EncodeToString(blobSum.Sum(nil))
	log.Printf("layer %s: %d entries, %d MB", filepath.Base(dir), p.entries, size>>20)
	return object{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "sha256:" + digest, "size": size},
		"sha256:" + hex.EncodeToString(diffSum.Sum(nil)),
		os.Rename(f.Name(), filepath.Join(blobs, digest))
}

// A packer writes the tree below dir as a tar.
type packer struct {
	dir     string
	tar     *tar.Writer
	names   map[uint64]string // by inode, of files with several names
	entries int
}

func (p *packer) add(path string, d fs.DirEntry, err error) error {
	if err != nil || path == p.dir {
		return err
	}
	name, err := filepath.Rel(p.dir, path)
	if err != nil {
		return err
	}
	fi, err := d.Info()
	if err != nil {
		return err
	}
	st := fi.Sys().(*syscall.Stat_t)
	switch {
	case fi.Mode()&fs.ModeSocket != 0:
		return nil
	case fi.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0: // overlayfs's whiteout
		return p.write(&tar.Header{Name: filepath.Join(filepath.Dir(name), ".wh."+d.Name())}, "")
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()), Format: tar.FormatPAX, PAXRecords: map[string]string{}}
	if err := p.xattrs(path, h); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	content := ""
	switch fi.Mode().Type() {
	case 0:
		first, seen := p.names[st.Ino]
		if h.Typeflag = tar.TypeReg; seen {
			h.Typeflag, h.Linkname = tar.TypeLink, first
			break
		}
		h.Size, content = st.Size, path
		if st.Nlink > 1 {
			p.names[st.Ino] = name
		}
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case fs.ModeSymlink:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = os.Readlink(path); err != nil {
			return err
		}
	case fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
		if h.Typeflag = tar.TypeBlock; fi.Mode()&fs.ModeCharDevice != 0 {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	if err := p.write(h, content); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	var opaque [1]byte
	if n, err := unix.Lgetxattr(path, "trusted.overlay.opaque", opaque[:]); err == nil && opaque[0] == 'y' && n == 1 {
		return p.write(&tar.Header{Name: name + "/.wh..wh..opq"}, "")
	}
	return nil
}

// write writes an entry and, if file is not "", that file's bytes.
func (p *packer) write(h *tar.Header, file string) error {
	p.entries++
	if err := p.tar.WriteHeader(h); err != nil || file == "" {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(p.tar, f)
	return errors.Join(err, f.Close())
}

// xattrs puts the attributes that belong into a layer into h.
func (p *packer) xattrs(path string, h *tar.Header) error {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil || n == 0 {
		return err
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "trusted.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return err
		}
		h.PAXRecords["SCHILY.xattr."+name] = string(value[:n])
	}
	return nil
}
