package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"lazuli/fs/rootfs"
)

// A Client asks a daemon on this machine.
type Client struct {
	socket string
	http   http.Client
}

// Dial returns a client of the daemon whose socket for containerd is given, or nil if none listens there.
func Dial(socket string) *Client {
	path := APISocket(socket)
	c := &Client{socket: path}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	c.http.Transport = &http.Transport{DialContext: dial}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		return nil
	}
	conn.Close()
	return c
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.send(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return c.failed(resp)
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("the daemon at %s: %w", c.socket, err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://lazuli"+path, &body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	var uerr *url.Error
	if errors.As(err, &uerr) {
		err = fmt.Errorf("the daemon at %s: %w", c.socket, uerr.Err)
	}
	return resp, err
}

func (c *Client) failed(resp *http.Response) error {
	var e MountEvent
	if json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&e) == nil && e.Error != "" {
		return errors.New(e.Error)
	}
	return fmt.Errorf("the daemon at %s answered %s", c.socket, resp.Status)
}

// Status asks what the daemon does.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.do(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// About asks which daemon it is.
func (c *Client) About(ctx context.Context) (a About, err error) {
	return a, c.do(ctx, http.MethodGet, "/v1/about", nil, &a)
}

// Images is [rootfs.Node.Images].
func (c *Client) Images(ctx context.Context) (list []rootfs.Image, err error) {
	return list, c.do(ctx, http.MethodGet, "/v1/images", nil, &list)
}

// Remove is [rootfs.Node.Remove].
func (c *Client) Remove(ctx context.Context, reference string) (int64, error) {
	var f Freed
	err := c.do(ctx, http.MethodDelete, "/v1/images?reference="+url.QueryEscape(reference), nil, &f)
	return f.Bytes, err
}

// Prune is [rootfs.Node.Prune].
func (c *Client) Prune(ctx context.Context) (int64, error) {
	var f Freed
	err := c.do(ctx, http.MethodPost, "/v1/prune", nil, &f)
	return f.Bytes, err
}

// Verify has every lazy layer of containerd's images read from beginning to end and compared with what its image claims.
func (c *Client) Verify(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/v1/verify", nil, &struct{}{})
}

// Mount has the daemon mount an image. notice and fetched are called with what it has to say meanwhile.
func (c *Client) Mount(ctx context.Context, q MountRequest, notice func(string), fetched func(int64)) (*Mounted, error) {
	resp, err := c.send(ctx, http.MethodPost, "/v1/mounts", q)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, c.failed(resp)
	}
	lines := json.NewDecoder(resp.Body)
	for {
		var e MountEvent
		if err := lines.Decode(&e); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return nil, fmt.Errorf("the daemon at %s broke off: %w", c.socket, err)
		}
		switch {
		case e.Error != "":
			return nil, errors.New(e.Error)
		case e.Mounted != nil:
			return e.Mounted, nil
		case e.Notice != "":
			notice(e.Notice)
		default:
			fetched(e.Fetched)
		}
	}
}

// Unmount ends a mount.
func (c *Client) Unmount(ctx context.Context, id string) (e Ended, err error) {
	return e, c.do(ctx, http.MethodDelete, "/v1/mounts/"+id, nil, &e)
}
